"""What the narrow formats can hold, without torch."""
