"""``--engine ray``: a process on each device of a Ray cluster, all of them members of one fleet.

Ray does four things: it tells which nodes there are, starts an actor for each device, carries the actors' reports to
the command, and tells when an actor or a node has ended. Slides are shared by claims, as without Ray, and each process
reads its slides from the drive and writes their outputs there: no pixel goes through Ray's object store.
"""
