//! The clock chip (Motorola MC146818A) that a PC has at ports 0x70 and 0x71, as far as guests read it: the host's time in UTC.

mod device;

pub(super) use device::Rtc;
