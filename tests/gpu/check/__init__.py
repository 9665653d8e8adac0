"""``make gpu-check``: what this product does on the card at hand, as one JSON file."""
