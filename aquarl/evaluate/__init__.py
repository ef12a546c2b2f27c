"""Numbers with intervals and baselines, and the page that shows them."""
