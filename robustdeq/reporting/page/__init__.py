"""One self-contained HTML file of a run: no request leaves the machine that opens it. No torch."""
