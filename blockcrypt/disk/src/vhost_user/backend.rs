//! The device, and its queues' threads.

use super::Device;
use super::config::{QUEUE_SIZE, features, protocol_features, space};
use super::end::End;
use super::request::{BATCH, Performer};
use super::ring::{Memory, Ring};
use super::signal::Signal;
use crate::Disk;
use std::error::Error;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackend, VringT};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventNotifier};

/// One front end's device.
pub(super) struct Backend {
    disk: Arc<dyn Disk>,
    space: [u8; 256],
    memory: OnceLock<Memory>,
    queues: Vec<Queue>,
    /// One for each queue. They outlive a front end: the system takes its time to give one back.
    signals: Arc<[Arc<Signal>]>,
    stopping: AtomicBool,
    /// The driver knows no FLUSH, so that what it writes must be durable by itself; as long as it did not say, neither.
    write_through: AtomicBool,
    heard: Box<dyn Fn(&str) + Send + Sync>,
}

/// A queue besides its ring.
struct Queue {
    /// Held while requests are performed, so that a queue is stopped between two batches of them.
    work: Mutex<Work>,
    end: End,
}

struct Work {
    performer: Performer,
    /// Its ring made no sense: it is not looked at again before it is set up anew.
    dead: bool,
}

impl Backend {
    pub(super) fn new(
        disk: Arc<dyn Disk>,
        device: &Device,
        signals: Arc<[Arc<Signal>]>,
        heard: Box<dyn Fn(&str) + Send + Sync>,
    ) -> io::Result<Self> {
        let queues = signals.iter().map(|_| {
            let work = Work { performer: Performer::new(&device.serial), dead: false };
            Ok(Queue { work: Mutex::new(work), end: End::new()? })
        });
        let queues = queues.collect::<io::Result<Vec<_>>>()?;
        let space = space(&*disk, queues.len() as u16);
        let (stopping, write_through) = (AtomicBool::new(false), AtomicBool::new(true));
        Ok(Self { disk, space, memory: OnceLock::new(), queues, signals, stopping, write_through, heard })
    }

    /// Where the front end's memory will be.
    pub(super) fn mapped(&self, memory: Memory) {
        let _ = self.memory.set(memory);
    }

    /// No more requests are begun.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
    }

    /// Performs what is in a queue, until it is empty or stopped.
    fn perform(&self, number: usize, vring: &Ring) {
        let mut work = self.queues[number].lock();
        while !work.dead {
            if let Err(error) = self.empty(number, &mut work.performer, vring) {
                work.dead = true;
                (self.heard)(&format!("queue {number} makes no sense, and is not served any more: {error}"));
                return;
            }
            match vring.enable_notification() {
                // Something came before the guest could know that it must say so.
                Ok(true) if !self.stopping.load(Ordering::Acquire) && is_running(vring) => {}
                _ => return,
            }
        }
    }

    fn empty(&self, number: usize, performer: &mut Performer, vring: &Ring) -> Result<(), Box<dyn Error>> {
        let Some(memory) = self.memory.get() else { return Ok(()) };
        let untold = |error| format!("the front end can't be told of requests that are done: {error}");
        vring.tells_with(&self.signals[number]).map_err(untold)?;
        vring.disable_notification()?;
        while !self.stopping.load(Ordering::Acquire) && is_running(vring) {
            let memory = memory.memory();
            // Not `pop_descriptor_chain`, which takes a ring that makes no sense for an empty one.
            let chains: Vec<_> = vring.get_mut().get_queue_mut().iter(memory.clone())?.take(BATCH).collect();
            if chains.is_empty() {
                break;
            }
            let write_through = self.write_through.load(Ordering::Acquire);
            for (head, written) in performer.perform(&*self.disk, write_through, chains, &memory) {
                vring.add_used(head, written)?;
            }
            if vring.needs_notification()? {
                vring.tell().map_err(untold)?;
            }
        }
        Ok(())
    }
}

/// Devices have no length, and no end within what they map.
fn is_there(region: &GuestRegionMmap) -> bool {
    let Some(place) = region.file_offset() else { return true };
    let Ok(file) = place.file().metadata() else { return false };
    !file.is_file() || place.start().checked_add(region.len()).is_some_and(|end| end <= file.len())
}

fn is_running(vring: &Ring) -> bool {
    let state = vring.get_ref();
    state.is_enabled() && state.get_queue().ready()
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = Ring;

    fn num_queues(&self) -> usize {
        self.queues.len()
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE.into()
    }

    fn features(&self) -> u64 {
        features(&*self.disk)
    }

    fn acked_features(&self, features: u64) {
        let flush = features & 1 << VIRTIO_BLK_F_FLUSH != 0;
        self.write_through.store(!flush, Ordering::Release);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        protocol_features()
    }

    /// The crate tells the rings themselves.
    fn set_event_idx(&self, _: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let range = offset as usize..(offset as usize).saturating_add(size as usize);
        self.space.get(range).map(<[u8]>::to_vec).unwrap_or_default()
    }

    /// Nothing in it can be written: the cache mode is not negotiated.
    fn set_config(&self, _: u32, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    /// It is the memory that this knows already, with other content: none where a file is too short, whose pages it would be deadly to
    /// touch.
    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        if memory.memory().iter().all(is_there) {
            return Ok(());
        }
        memory.lock().unwrap_or_else(PoisonError::into_inner).replace(GuestMemoryMmap::new());
        Err(io::Error::new(io::ErrorKind::InvalidInput, "the memory that the front end shares is longer than its file"))
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.queues.len()).map(|queue| 1 << queue).collect()
    }

    fn exit_event(&self, thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        self.queues.get(thread)?.end.take()
    }

    fn stop_vring(&self, queue: u32) -> io::Result<()> {
        if let Some(queue) = self.queues.get(queue as usize) {
            // Waits for the requests under way.
            queue.lock().dead = false;
        }
        Ok(())
    }

    fn handle_event(&self, event: u16, _: EventSet, vrings: &[Ring], thread: usize) -> io::Result<()> {
        // Each thread has one ring.
        if let Some(vring) = vrings.get(usize::from(event)) {
            self.perform(thread, vring);
        }
        Ok(())
    }
}
