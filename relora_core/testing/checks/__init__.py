"""The checks: functions that check all properties of a subject, one after the other."""
