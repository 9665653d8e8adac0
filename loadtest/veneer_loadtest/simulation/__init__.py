"""``veneer-sim``: a cluster in virtual time, with the product's own decisions.

What decides is the real code: each replica's step loop with its scheduler, block manager,
prefix cache and residency, and the router in front. What takes time is modelled: a step, a
load, a fetch and a message take what `costs` says. Nothing here waits, so a thousand replicas
fit into one process, and a run depends on its seed only.

::

    scenario    what to simulate
    happenings  losses, drains, partitions and publications
    traffic     the requests, from a seed
    costs       what takes how long, and its file
    events      the clock
    replica     one server: the real engine on that clock
    loader      its reads of adapters
    registry    names and bytes that replicas get
    cluster     ingress, router, replicas: a run
    figures     the result
    servers     real servers on this machine
    real        the same load on them
    fit         costs from one of them
    options, command: the program
"""
