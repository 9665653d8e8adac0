"""What lies between the multiplies of a layer: norms, rotary positions, the gate."""
