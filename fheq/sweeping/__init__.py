"""What sweeps are over, and what they give: configurations and results."""
