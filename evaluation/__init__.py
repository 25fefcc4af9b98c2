"""What an evaluation shows beyond its accuracy: a report, and class activation maps. Imported only when asked for."""
