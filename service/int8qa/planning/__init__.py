"""How many replicas a service needs, from measured costs and a simulation.

In: engine times, a gateway's measured overheads, lengths of questions, a rate and a
bound on latency. Out: replicas, utilisation, latency and cost by precision, and how far
such predictions were off where the truth was measured.
"""
