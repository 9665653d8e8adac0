"""What a registry tells its followers, and what it knows of them."""
