"""What the service and its engines can do on a machine, measured from outside.

In: a running gateway, or a model repository. Out: figures with their provenance, as
JSON and as a page. Nothing of it is imported by the gateway or the reader.
"""
