"""What every floor needs: errors, files, logs, seeds, the process world and the command-line frame."""
