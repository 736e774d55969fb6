//! Power: the ports through which the guest powers off and resets, and the button through which it is asked to.

mod device;

pub(super) use device::Power;
pub(super) use device::{EVENT_BUTTON, EVENT_GENERATION, EVENT_SLOTS, RESET_VALUE, SLEEP_TYPE_OFF};
