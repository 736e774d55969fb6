//! The VM's volumes: opened with released keys, shown to the guest as disks, anchored at the provider, rested, wiped and
//! put back as the lease goes.

use crate::exit::{Exit, Failure, chain};
use crate::machine::{Disk, DiskError};
use crate::opener::{Access, Opener};
use crate::provider::{AnchorAnswer, Link};
use crate::steps::Steps;
use attest::flow::OpenedRelease;
use attest::protocol::KeyName;
use blockcrypt::{AnchorRefused, Anchors, Events, FileStore, Kek, OpenOptions, Volume, VolumeError};
use policy::report::ReportEvent;
use policy::{VolumeAnchor, VolumeId};
use secretmem::Secret;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

/// All volumes of one VM, in the order of its disks.
#[derive(Default)]
pub struct Volumes {
    all: Vec<Opened>,
}

/// One of them.
pub struct Opened {
    /// The disk's name in the configuration.
    pub name: String,
    /// Whether the guest may not write.
    pub readonly: bool,
    /// The volume.
    pub volume: Arc<Volume>,
    /// Whether somebody waits for it to be flushed.
    resting: AtomicBool,
}

impl Volumes {
    /// Opens what `disks` name, with the keys that `opened` brought. Where one does not open, those before it are closed.
    pub fn open(
        disks: &[policy::config::Disk],
        opened: &OpenedRelease,
        opener: &Opener,
        link: &Link,
        steps: Steps,
    ) -> Result<Self, Failure> {
        let mut volumes = Self::default();
        for disk in disks {
            match open(disk, opened, opener, link, steps) {
                Ok(volume) => volumes.all.push(volume),
                Err(failure) => {
                    volumes.close_unused(link, steps);
                    return Err(failure);
                }
            }
        }
        Ok(volumes)
    }

    /// Each of them.
    pub fn iter(&self) -> impl Iterator<Item = &Opened> {
        self.all.iter()
    }

    /// Makes everything durable that the guest wrote, before keys go: of all, whatever becomes of one, and without the provider.
    pub fn rest(&self) -> Result<(), String> {
        self.each(Opened::rest)
    }

    /// Those that somebody waits for to be flushed: where that takes long, their stores hang.
    pub fn resting(&self) -> Vec<&str> {
        self.all.iter().filter(|opened| opened.resting.load(Ordering::SeqCst)).map(|opened| &*opened.name).collect()
    }

    /// The machine is to stand still: no FLUSH of the guest's waits for the provider until it is not.
    pub fn stand_still(&self, still: bool) {
        self.all.iter().for_each(|opened| opened.volume.let_flush_wait(!still));
    }

    /// Wipes all keys, at once.
    pub fn wipe_keys(&self) {
        self.all.iter().for_each(|opened| opened.volume.wipe_keys());
    }

    /// Puts keys back that `release` brought.
    pub fn put_back_keys(&self, release: &OpenedRelease) -> Result<(), String> {
        for opened in &self.all {
            let kek = kek(release, opened.volume.id()).map_err(|f| f.message)?;
            opened
                .volume
                .put_back_keys(&kek)
                .map_err(|e| format!("keys can't be put back into volume {}: {}", opened.name, chain(&e)))?;
        }
        Ok(())
    }

    /// Closes all: everything of each is made durable, then it is anchored as closed. An anchor that is not kept is told and no more: the
    /// next opener finds what is durable. An error is data that are not.
    pub fn close(&self, link: &Link, steps: Steps) -> Result<(), String> {
        self.each(|opened| opened.close(link, steps))
    }

    /// Does `act` with all at once, so that one whose store hangs holds up no other. The first one's error.
    fn each(&self, act: impl Fn(&Opened) -> Result<(), String> + Sync) -> Result<(), String> {
        let Some((first, others)) = self.all.split_first() else { return Ok(()) };
        let act = &act;
        thread::scope(|scope| {
            let begin =
                |opened| thread::Builder::new().name("volume-rest".into()).spawn_scoped(scope, move || act(opened));
            let begun: Vec<_> = others.iter().map(|opened| (opened, begin(opened))).collect();
            let ended = begun.into_iter().map(|(opened, thread)| match thread {
                Ok(thread) => {
                    thread.join().unwrap_or_else(|_| Err(format!("volume {}: a thread panicked", opened.name)))
                }
                // Without threads they wait for each other.
                Err(_) => act(opened),
            });
            std::iter::once_with(|| act(first)).chain(ended).fold(Ok(()), Result::and)
        })
    }

    /// Closes all before a guest ran: there is nothing of it to lose, and nothing to wait for.
    pub fn close_unused(&self, link: &Link, steps: Steps) {
        link.hurry(Duration::ZERO);
        let _ = self.close(link, steps);
    }
}

impl Opened {
    fn rest(&self) -> Result<(), String> {
        self.flush().map_err(|e| self.unflushed(&chain(&e)))
    }

    fn flush(&self) -> Result<(), VolumeError> {
        self.resting.store(true, Ordering::SeqCst);
        let flushed = self.volume.checkpoint();
        self.resting.store(false, Ordering::SeqCst);
        flushed
    }

    fn unflushed(&self, why: &str) -> String {
        format!("volume {} is not flushed: {why}", self.name)
    }

    fn close(&self, link: &Link, steps: Steps) -> Result<(), String> {
        // Nobody puts keys back any more.
        let why = |error: VolumeError| match error {
            VolumeError::NoKeys => "its keys went with the lease".to_owned(),
            other => chain(&other),
        };
        let rested = self.flush().map_err(|e| self.unflushed(&why(e)));
        let closed = self.volume.close().map_err(why);
        // What closes is flushed, whatever came before.
        let flushed = if closed.is_ok() { Ok(()) } else { rested };
        match closed.and_then(|anchor| self.anchor_closed(anchor, link)) {
            Ok(()) => steps.step("volume-closed", &self.name),
            Err(why) => steps.step("volume-not-closed", &format!("{}: {why}", self.name)),
        }
        flushed
    }

    fn anchor_closed(&self, anchor: VolumeAnchor, link: &Link) -> Result<(), String> {
        if self.readonly {
            // Nothing was written under its open number, so that there is nothing to anchor: the instance's end frees it.
            return Ok(());
        }
        match link.anchor(anchor, true) {
            AnchorAnswer::Kept => Ok(()),
            AnchorAnswer::Away(why) | AnchorAnswer::GivenUp(why) | AnchorAnswer::Refused(why) => Err(why),
        }
    }
}

fn open(
    disk: &policy::config::Disk,
    opened: &OpenedRelease,
    opener: &Opener,
    link: &Link,
    steps: Steps,
) -> Result<Opened, Failure> {
    let bad = |why: String| Failure::new(Exit::Volume, format!("volume {}: {why}", disk.id));
    let grant = opened.release.volumes.iter().find(|grant| grant.volume == disk.volume);
    let grant = grant.ok_or_else(|| bad(format!("the key provider granted no volume {}", disk.volume)))?;
    let mut grant = grant.clone();
    grant.anchor_mode = disk.anchor_mode;
    let kek = kek(opened, disk.volume)?;
    let access = if disk.readonly { Access::ReadStore } else { Access::WriteStore };
    // The name of the disk is what --map maps; without a mapping its file lies beside the VM file.
    let file = opener.open_disk(disk, access).map_err(|e| bad(chain(&e)))?;
    let store = if disk.readonly { FileStore::shared(file) } else { FileStore::exclusive(file) };
    let store = store.map_err(|e| bad(chain(&e)))?;
    let keeper = Arc::new(Keeper {
        volume: disk.volume,
        name: disk.id.to_string(),
        link: link.clone(),
        steps,
        untold: AtomicU64::new(0),
    });
    let options = OpenOptions { read_only: disk.readonly, ..OpenOptions::default() };
    let volume = Volume::open(store, &grant, &kek, options, keeper.clone(), keeper).map_err(|e| bad(chain(&e)))?;
    let (name, resting) = (disk.id.to_string(), AtomicBool::new(false));
    Ok(Opened { name, readonly: disk.readonly, volume: Arc::new(volume), resting })
}

fn kek(opened: &OpenedRelease, volume: VolumeId) -> Result<Kek, Failure> {
    let missing = || Failure::new(Exit::Volume, format!("the key provider sent no key of volume {volume}"));
    let index = opened.release.volumes.iter().position(|grant| grant.volume == volume).ok_or_else(missing)?;
    let key = opened.key(KeyName::Volume(index)).ok_or_else(missing)?;
    let key = Secret::copy_of(key.expose()).map_err(|e| Failure::of(Exit::Host, &e))?;
    Ok(Kek::new(opened.release.volumes[index].kek_id, key))
}

/// Keeps anchors and tells events of one volume.
struct Keeper {
    volume: VolumeId,
    name: String,
    link: Link,
    steps: Steps,
    /// Events that found no room among the reports.
    untold: AtomicU64,
}

impl Anchors for Keeper {
    fn keep(&self, anchor: &VolumeAnchor) -> Result<(), AnchorRefused> {
        match self.link.anchor(anchor.clone(), false) {
            AnchorAnswer::Kept => Ok(()),
            AnchorAnswer::Away(why) => Err(AnchorRefused::Away(why)),
            AnchorAnswer::GivenUp(why) => Err(AnchorRefused::GivenUp(why)),
            AnchorAnswer::Refused(why) => Err(AnchorRefused::Refused(why)),
        }
    }
}

impl Events for Keeper {
    fn integrity(&self, lba: Option<u64>, physical: Option<u64>, reason: &str) {
        let block = lba.map(|lba| format!(" block {lba}")).unwrap_or_default();
        self.steps.step("disk-integrity", &format!("{}{block}: {reason}", self.name));
        // A store that is wrong everywhere must not use up the room of what else there is to report: what finds none is
        // counted, and told with the next that does.
        if self.link.room().is_err() {
            self.untold.fetch_add(1, Ordering::SeqCst);
            return;
        }
        let reason = match self.untold.swap(0, Ordering::SeqCst) {
            0 => reason.to_owned(),
            untold => format!("{reason} ({untold} before it found no room to be reported)"),
        };
        self.link.report(ReportEvent::DiskIntegrity { volume: self.volume, lba, physical, reason });
    }

    fn note(&self, text: &str) {
        self.steps.step("volume", &format!("{}: {text}", self.name));
    }
}

/// A volume as the machine sees it.
pub struct VolumeDisk(pub Arc<Volume>);

impl Disk for VolumeDisk {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), DiskError> {
        self.0.read(offset, data).map_err(disk_error)
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        self.0.write(offset, data).map_err(disk_error)
    }

    fn read_many(&self, requests: &mut [(u64, &mut [u8])]) -> Vec<Result<(), DiskError>> {
        self.0.read_many(requests).into_iter().map(|done| done.map_err(disk_error)).collect()
    }

    fn write_many(&self, requests: &[(u64, &[u8])]) -> Vec<Result<(), DiskError>> {
        self.0.write_many(requests).into_iter().map(|done| done.map_err(disk_error)).collect()
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.0.flush().map_err(disk_error)
    }

    fn can_discard(&self) -> bool {
        true
    }

    fn discard(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.0.discard(offset, length).map_err(disk_error)
    }

    fn write_zeroes(&self, offset: u64, length: u64, may_unmap: bool) -> Result<(), DiskError> {
        self.0.write_zeroes(offset, length, may_unmap).map_err(disk_error)
    }

    fn grow(&self, bytes: u64) -> Result<(), DiskError> {
        self.0.grow(bytes).map_err(disk_error)
    }

    fn id(&self) -> [u8; 20] {
        let mut id = [0; 20];
        let text = hex::encode(self.0.id().0);
        id.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from);
        id
    }
}

fn disk_error(error: VolumeError) -> DiskError {
    match error {
        // A FLUSH is not to wait for the provider now; its data are durable.
        VolumeError::NoKeys | VolumeError::Anchor(AnchorRefused::Away(_)) => DiskError::NotNow,
        other => DiskError::Io(Box::new(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::provider::Contacts;
    use blockcrypt::{MemoryStore, Nobody, Store, inspect};
    use policy::disk::{CipherSuite, VolumeGrant};
    use policy::{AnchorMode, KeyId};
    use std::io;
    use std::sync::atomic::AtomicBool;

    /// A store that one day makes nothing durable any more.
    #[derive(Default)]
    struct Failing {
        inner: MemoryStore,
        fails: AtomicBool,
    }

    impl Store for Failing {
        fn len(&self) -> io::Result<u64> {
            self.inner.len()
        }
        fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
            self.inner.read_at(buffer, offset)
        }
        fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
            self.inner.write_at(bytes, offset)
        }
        fn sync_data(&self) -> io::Result<()> {
            if self.fails.load(Ordering::SeqCst) { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
        }
        fn set_len(&self, bytes: u64) -> io::Result<()> {
            self.inner.set_len(bytes)
        }
    }

    /// A volume that holds something which is not durable yet.
    fn opened(name: &str, store: &Arc<Failing>) -> Opened {
        let grant = VolumeGrant {
            volume: VolumeId::random(),
            customer: "acme".parse().expect("label"),
            cipher: CipherSuite::Aes256XtsHmacSha256,
            kek_id: KeyId(1),
            key_id: KeyId(2),
            open_number: 1.try_into().expect("number"),
            anchor: None,
            anchor_mode: AnchorMode::Interval,
        };
        let kek = Kek::new(KeyId(1), Secret::random().expect("memory"));
        let volume = Volume::create(store.clone(), 1 << 20, &grant, &kek, Arc::new(Nobody), Arc::new(Nobody));
        let volume = volume.expect("a volume");
        volume.write(0, &[7; 4096]).expect("written");
        Opened { name: name.into(), readonly: false, volume: Arc::new(volume), resting: AtomicBool::new(false) }
    }

    #[test]
    fn volumes_that_are_closed_say_whether_they_are_flushed_whatever_becomes_of_one_and_of_anchors() {
        let nobody = || Err(Failure::new(Exit::Tpm, "there is no TPM"));
        let (post, _inbox) = crate::post::office().expect("an office");
        let link = Link::start(Contacts { attester: Box::new(nobody) }, Steps::new(true), post).expect("a thread");
        let stores: Vec<Arc<Failing>> = (0..3).map(|_| Arc::default()).collect();
        let all = ["a", "b", "c"].iter().zip(&stores).map(|(name, store)| opened(name, store)).collect();
        let volumes = Volumes { all };
        stores[1].fails.store(true, Ordering::SeqCst);
        let flushed = volumes.close(&link, Steps::new(true));
        assert!(flushed.as_ref().is_err_and(|why| why.starts_with("volume b is not flushed")), "{flushed:?}");
        let closed = |store: &Arc<Failing>| inspect(store).expect("a volume").closed;
        assert!(closed(&stores[0]) && closed(&stores[2]), "no anchor is kept, and they are durable all the same");

        let volumes = Volumes { all: vec![opened("d", &Arc::default())] };
        assert_eq!(volumes.rest(), Ok(()));
        volumes.wipe_keys();
        assert_eq!(volumes.close(&link, Steps::new(true)), Ok(()), "what rested before its keys went is flushed");
        let volumes = Volumes { all: vec![opened("e", &Arc::default())] };
        volumes.wipe_keys();
        let lost = volumes.close(&link, Steps::new(true));
        assert_eq!(lost, Err("volume e is not flushed: its keys went with the lease".to_owned()));
    }
}
