"""Training: a reader from an encoder, and INT8 that was trained for.

In: checkpoints and SQuAD-format files. Out: checkpoints that the build takes. Imports
the build and the reader, never the gateway; nothing but the command line imports it.
"""
