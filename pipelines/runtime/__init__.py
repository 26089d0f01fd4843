"""What every job stands on: files, commands, records, machines, units of work. No stage here."""
