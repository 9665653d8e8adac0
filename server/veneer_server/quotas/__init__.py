"""How much each caller and tenant may do, and what it has done."""
