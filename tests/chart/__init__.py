"""Renders the Helm chart with Helm itself, and checks what comes out."""
