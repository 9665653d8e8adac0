"""The classes that Serve runs: `Registry`, `Engine` (one for each replica) and `Ingress`."""
