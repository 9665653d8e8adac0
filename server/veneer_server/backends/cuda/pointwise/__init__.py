"""The operations between a layer's matrix multiplies: norms, rotary embedding, the gate."""
