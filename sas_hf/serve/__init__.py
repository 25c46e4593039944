"""What serving engines and exporters need of the SAS architectures, one file an engine or a format."""
