"""Plans by time, found on top of the token plan."""
