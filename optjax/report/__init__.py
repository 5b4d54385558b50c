"""Claims, plotting style and the HTML report."""
