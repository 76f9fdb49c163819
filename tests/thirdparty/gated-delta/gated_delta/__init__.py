"""The gated delta rule as a mixer: a recurrence over tokens, whose cache is a state."""
