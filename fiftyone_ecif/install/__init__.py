"""What has to be on a machine: FiftyOne's database, the plugin's place, and a doctor who looks."""
