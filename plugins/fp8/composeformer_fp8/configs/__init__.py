"""The scaled formats on paper, without torch."""
