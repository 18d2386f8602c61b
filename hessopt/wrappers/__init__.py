"""Around any optimizer: escape from saddles, and steps that keep to null directions of what was learned."""
