"""Engines supply the small namespace of primitives (`ops`) that operators and rules are written in."""
