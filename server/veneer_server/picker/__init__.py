"""An endpoint picker for the Gateway API inference extension: `routing` behind Envoy's ext_proc
protocol. It stands alone, since it is a process of its own, ``veneer-server picker``.
"""
