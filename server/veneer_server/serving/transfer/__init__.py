"""Adapters that move without a client's upload: downloads, registration by URI, watched
folders."""
