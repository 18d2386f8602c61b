"""The three other theories beside their controls."""
