"""Low precision: what numbers become, packed weights in place of linears and experts, and back."""
