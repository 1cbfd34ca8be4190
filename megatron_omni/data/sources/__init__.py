"""Collections of recordings as their owners keep them: lines that become samples."""
