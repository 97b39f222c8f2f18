"""Plans that keep tokens near, found on top of the token plan."""
