"""The built-in defenses, a family a file; reached through the registry alone."""
