"""What followers ask a registry, and what a follower asks for its callers."""
