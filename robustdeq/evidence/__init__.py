"""What a run claims, scored again by a stranger: bundles, verification, submissions."""
