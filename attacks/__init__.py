"""The built-in attacks, a family a file; reached through the registry alone."""
