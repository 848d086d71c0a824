"""The ground everything stands on: errors, vocabulary, settings, records and statistics. No torch."""
