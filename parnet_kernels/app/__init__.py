"""The application: command line, demo, pictures, self-test."""
