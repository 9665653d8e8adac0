"""``veneer-sim``: simulates a cluster in virtual time, with the product's own decisions.

All decisions are made by the real code: each replica's queue, its step loop with scheduler,
block manager, prefix cache and residency, the router in front, and the policy that scales on
Ray. Durations are modelled: a step, a load, a fetch and a message take as long as `costs` says.
Nothing here waits, so a thousand replicas fit into one process, and a run depends only on its
seed.

::

    scenario    what to simulate
    happenings  losses, drains, partitions and publications
    traffic     adapters and requests, from a seed or a trace
    costs       how long each operation takes, and the file of costs
    events      the clock
    replica     one server: the real engine on that clock
    loader      a replica's loads of adapters from disk
    registry    names and bytes that replicas get from the registry
    scaling     the number of replicas, under autoscaling
    cluster     ingress, router, replicas: a run
    search      the replicas that an SLO needs
    figures     the result
    servers     real servers on this machine
    real        the same load on real servers
    fit         costs measured on a real server
    options, command: the program
"""
