//! The VM generation id ("Virtual Machine Generation ID", Microsoft, 2012): 16 random bytes in the guest's memory that are
//! other ones whenever a saved state begins to run, so that the guest knows that its random numbers may have been drawn before.

mod device;

pub(super) use device::{ADDRESS_NAME, COMPATIBLE, Generation};
