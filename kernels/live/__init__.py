"""Live slots: what this batch fetches, found on top of the plan of the static copies."""
