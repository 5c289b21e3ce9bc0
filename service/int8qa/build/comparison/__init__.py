"""The result of a comparison as one HTML page: table, figures, raw data."""
