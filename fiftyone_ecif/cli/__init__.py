"""The command line: the plugin's jobs from a shell."""
