"""Model folders in the formats of other engines; the recipe `export` is the way in."""
