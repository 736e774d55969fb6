//! Disks of a configuration, as the machine takes them.

use crate::machine::rate::{Rate, RateLimits};
use crate::machine::{DiskSettings, serial_number};
use policy::config::{DiskShape, RateLimiterConfig, TokenBucket};
use std::time::Duration;

/// How the disk is shown and served.
pub(crate) fn settings(shape: &DiskShape<'_>) -> DiskSettings {
    DiskSettings {
        read_only: shape.readonly,
        queues: shape.num_queues,
        queue_size: shape.queue_size,
        serial: shape.serial.map(serial_number),
        limits: shape.rate_limiter.map(limits).unwrap_or_default(),
    }
}

/// Limits of a disk or another device.
pub(crate) fn limits(config: RateLimiterConfig) -> RateLimits {
    RateLimits { bandwidth: config.bandwidth.map(rate), operations: config.ops.map(rate) }
}

fn rate(bucket: TokenBucket) -> Rate {
    let TokenBucket { size, one_time_burst, refill_time } = bucket;
    Rate { size, one_time_burst, refill: Duration::from_millis(refill_time) }
}
