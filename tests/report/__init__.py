"""The report: sections, claims, verification, exports, and the page in a browser."""
