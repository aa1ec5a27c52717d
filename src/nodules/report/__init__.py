"""From what a run kept to the report page and the cards."""
