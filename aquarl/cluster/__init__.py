"""Ray hires the plain classes of the other folders."""
