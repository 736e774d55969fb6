//! `create`, `import` and `clone`: a volume appears whole, with its anchor at the key provider, or not at all.

use super::blocks::{PIECE, filled};
use super::change::permitted;
use super::cli::{Clone, Create, Format, Import, More};
use super::error::ToolError;
use super::holder::{Answer, Handover, Holder, HolderError, Leave};
use super::image::{Image, ImageError};
use super::place::{Content, Place, PlaceError, same_file};
use super::progress::{Progress, rate};
use super::qcow2::Qcow2;
use super::qemu;
use super::size::Bytes;
use super::{Context, crew, open_file, open_snapshot, open_writable};
use blockcrypt::{AnchorRefused, Anchors, FileStore, Volume, VolumeError, inspect};
use policy::disk::{VolumeGrant, VolumeOperation, VolumeRequest};
use policy::{AnchorMode, VolumeAnchor, VolumeId};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Why a volume was not made, or not wholly.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MakeError {
    #[error("the key provider refused the volume's first anchor, so the volume was not made: {0}")]
    Anchor(String),
    #[error(
        "{path} stands complete, but whether the provider keeps its anchor is not known: {why}; if fealty-keys volume list shows none, make it anew with --force"
    )]
    Unknown { path: PathBuf, why: String },
    #[error("{path} is made and anchored, but was not closed in order")]
    Close {
        path: PathBuf,
        #[source]
        source: VolumeError,
    },
    #[error("{0} was closed without an anchor, so it was not made")]
    NoAnchor(PathBuf),
}

#[derive(Serialize)]
struct Made<'a> {
    volume: VolumeId,
    path: &'a Path,
    size: u64,
    data: u64,
}

#[derive(Serialize)]
struct Cloned<'a> {
    volume: VolumeId,
    of: VolumeId,
    name: &'a str,
    path: &'a Path,
    size: u64,
    data: u64,
}

/// A volume that is to be made in `place`, and get the name `path`.
struct Making<'a> {
    path: &'a Path,
    place: Place,
    grant: VolumeGrant,
    holder: Arc<Holder>,
}

/// An empty volume.
pub(super) fn create(context: &Context, words: &Create) -> Result<(), ToolError> {
    let size = words.size.bytes();
    let place = Place::begin(&words.volume, Content::Volume, words.force, &context.interrupts)?;
    let new = New { path: &words.volume, size, more: &words.more };
    let id = make_empty(context, "create", new, place, |_, _| Ok(()))?;
    let made = Made { volume: id, path: &words.volume, size, data: 0 };
    let text = format!("created volume {id} in {}: {}", words.volume.display(), Bytes(size));
    context.report.result(&made, &text)
}

/// A volume from an image.
pub(super) fn import(context: &Context, words: &Import) -> Result<(), ToolError> {
    match words.format {
        Format::Raw => import_raw(context, words),
        Format::Qcow2 => import_qcow2(context, words),
    }
}

fn import_raw(context: &Context, words: &Import) -> Result<(), ToolError> {
    let mut image = Image::open(&words.image, words.size.map(super::size::Size::bytes))?;
    if same_file(&image, &words.volume) {
        return Err(ToolError::SameFile(words.image.clone(), words.volume.clone()));
    }
    let size = image.volume_size();
    make_from_image(context, words, size, |volume, holder, progress| {
        // Whoever waits for a pipe waits alone.
        let threads = if image.is_seekable() { crew::size() } else { 1 };
        let source = Mutex::new(Source { image: &mut image, progress, data: 0, at: 0, failed: None, over: false });
        let lock = || source.lock().unwrap_or_else(PoisonError::into_inner);
        let next = |buffer: &mut [u8]| lock().next(buffer, holder);
        let work = || {
            let mut buffer = vec![0; PIECE];
            while let Some((at, length)) = next(&mut buffer) {
                let mut data = 0;
                let written = filled(&buffer[..length]).try_for_each(|(offset, run)| {
                    data += run.len() as u64;
                    volume.write(at + offset as u64, run)
                });
                lock().written(
                    at + length as u64,
                    data,
                    written.map_err(|e| ToolError::Volume(words.volume.clone(), e)),
                );
            }
        };
        context.while_there(holder, || crew::together(threads, work, || lock().over = true))?;
        let Source { data, failed, .. } = source.into_inner().unwrap_or_else(PoisonError::into_inner);
        failed.map_or(Ok(data), Err)
    })
}

/// An image that several threads import, piece by piece.
struct Source<'a> {
    image: &'a mut Image,
    progress: &'a mut Progress,
    /// Bytes that were not zero.
    data: u64,
    /// Where the last of the pieces that are written ends; some before it may be under way.
    at: u64,
    /// The first error.
    failed: Option<ToolError>,
    /// There are no more pieces.
    over: bool,
}

impl Source<'_> {
    /// The next piece, if there is one: where it belongs, and its bytes.
    fn next(&mut self, buffer: &mut [u8], holder: &Holder) -> Option<(u64, usize)> {
        if self.over {
            return None;
        }
        // Reading may have taken long.
        let next = self.image.next(buffer).map_err(ToolError::from);
        let next = next.and_then(|next| holder.still_there().map(|()| next).map_err(ToolError::from));
        self.over = !matches!(next, Ok(Some(_)));
        next.unwrap_or_else(|error| {
            self.failed.get_or_insert(error);
            None
        })
    }

    /// A piece is written, or can't be.
    fn written(&mut self, end: u64, data: u64, done: Result<(), ToolError>) {
        if let Err(error) = done {
            self.over = true;
            self.failed.get_or_insert(error);
        }
        self.data += data;
        self.at = self.at.max(end);
        self.progress.at(self.at);
    }
}

fn import_qcow2(context: &Context, words: &Import) -> Result<(), ToolError> {
    if words.image.as_os_str() == "-" {
        return Err(ToolError::NotAFile("standard input".into()));
    }
    let image = Qcow2::open(&words.image)?;
    let wanted = words.size.map_or(image.size, super::size::Size::bytes);
    if wanted < image.size {
        return Err(ImageError::Larger { path: words.image.clone(), image: image.size, wanted }.into());
    }
    make_from_image(context, words, wanted, |volume, holder, progress| {
        let imported = qemu::import(image, volume, holder, progress);
        holder.still_there()?;
        imported.map_err(|e| ToolError::converting(&words.volume, e))
    })
}

/// Makes a volume of `size` bytes with what `fill` writes; it says how much data that was.
fn make_from_image(
    context: &Context,
    words: &Import,
    size: u64,
    fill: impl FnOnce(&Volume, &Holder, &mut Progress) -> Result<u64, ToolError>,
) -> Result<(), ToolError> {
    let place = Place::begin(&words.volume, Content::Volume, words.force, &context.interrupts)?;
    let (mut data, mut seconds) = (0, 0.0);
    let new = New { path: &words.volume, size, more: &words.more };
    let id = make_empty(context, "import", new, place, |volume, holder| {
        let mut progress = Progress::of("import", size, context.report.json);
        data = fill(volume, holder, &mut progress)?;
        seconds = progress.seconds();
        Ok(())
    })?;
    let made = Made { volume: id, path: &words.volume, size, data };
    let text = format!(
        "imported {} into volume {id} in {}: {}, of it {} data, {} of that",
        if words.image.as_os_str() == "-" { "standard input".into() } else { words.image.display().to_string() },
        words.volume.display(),
        Bytes(size),
        Bytes(data),
        rate(data, seconds)
    );
    context.report.result(&made, &text)
}

const UNCLONED: &str = "there is no clone, and the volume is as it was; the key provider may have the clone's name, and takes it from the next run";
const UNCLONED_RECOVERED: &str = "there is no clone, and the volume is whole; the key provider may have the clone's name, and takes it from the next run";

/// The same data as another volume.
pub(super) fn clone(context: &Context, words: &Clone) -> Result<(), ToolError> {
    let file = open_file(&words.volume)?;
    if same_file(&file, &words.clone) {
        return Err(ToolError::SameFile(words.volume.clone(), words.clone.clone()));
    }
    let failed = |e| ToolError::Volume(words.volume.clone(), e);
    let place = Place::begin(&words.clone, Content::Volume, words.force, &context.interrupts)?;
    let handover = context.handover("clone")?;
    let store = FileStore::shared(file.try_clone().map_err(|e| ToolError::Open(words.volume.clone(), e))?);
    let closed = store.and_then(|store| inspect(&store)).map_err(failed)?.closed;
    let holder = &handover.holder;
    let mut request = VolumeRequest::plain(VolumeOperation::Clone).with("name", &words.name);
    if let Some(snapshot) = words.snapshot {
        request = request.with("snapshot", snapshot);
    }
    // What can't be cloned is found before the key provider makes its part of a clone.
    let (whole, unclosed, cut_off) = match closed || words.snapshot.is_some() {
        true => (Some(open_snapshot(&words.volume, file, &handover, words.snapshot)?), None, UNCLONED),
        false => (None, Some(file), UNCLONED_RECOVERED),
    };
    // It does that before it answers.
    context.interrupts.changing_besides(cut_off);
    let uncloned = |error: ToolError| match error.leaves_a_volume() {
        true => error,
        false => ToolError::Uncloned(words.name.clone(), Box::new(error)),
    };
    let mut data = 0;
    let (source, id) = permitted(holder, request, |leave| {
        let Leave::Clone(grant, kek) = leave else {
            return Err(HolderError::NoPermit(VolumeOperation::Clone, "it brought no volume to clone to".into()).into());
        };
        let source = match whole {
            Some(volume) => volume,
            // One that was not closed in order is recovered first, as whoever opens it does.
            None => {
                // And with it its lock.
                drop(unclosed);
                open_writable(&words.volume, &handover).map_err(uncloned)?
            }
        };
        let making = Making { path: &words.clone, place, grant: *grant, holder: holder.clone() };
        let id = making.make(|store, grant, first| {
            let mut progress = None;
            let mut heard = |done: u64, all: u64| {
                data = done * 4096;
                let told = progress.get_or_insert_with(|| Progress::of("clone", all * 4096, context.report.json));
                told.at(data);
            };
            // What is not as it should be, was read.
            let of = |e: &VolumeError| if e.is_integrity() { &words.volume } else { &words.clone };
            let named = |e: VolumeError| ToolError::Volume(of(&e).clone(), e);
            make_room(&store, source.size(), &words.more).map_err(named)?;
            let copy = || Volume::create_clone(store, &source, grant, &kek, first, holder.clone(), &mut heard);
            context.while_there(holder, copy)?.map_err(named)
        });
        if id.is_err() {
            // It was opened, and is anchored as it is now.
            let _ = source.close();
        }
        Ok((source, id.map_err(uncloned)?))
    })?;
    let (of, size) = (source.id(), source.size());
    // Whatever comes of this, the clone is made, and its outcome told.
    source.close().map_err(failed)?;
    let made = Cloned { volume: id, of, name: &words.name, path: &words.clone, size, data };
    let text = format!(
        "cloned volume {of} as {} ({id}) in {}: {}, of it {} data",
        words.name,
        words.clone.display(),
        Bytes(size),
        Bytes(data)
    );
    context.report.result(&made, &text)
}

/// What a volume is to be.
struct New<'a> {
    path: &'a Path,
    size: u64,
    more: &'a More,
}

/// Makes a new volume with what `fill` writes.
fn make_empty(
    context: &Context,
    command: &'static str,
    new: New<'_>,
    place: Place,
    fill: impl FnOnce(&Volume, &Holder) -> Result<(), ToolError>,
) -> Result<VolumeId, ToolError> {
    let New { path, size, more } = new;
    let Handover { grant, kek, holder, .. } = context.handover(command)?;
    let making = Making { path, place, grant, holder: holder.clone() };
    making.make(|store, grant, first| {
        make_room(&store, size, more).map_err(|e| ToolError::Volume(path.to_owned(), e))?;
        let volume = Volume::create(store, size, grant, &kek, first, holder.clone());
        drop(kek);
        let volume = volume.map_err(|e| ToolError::Volume(path.to_owned(), e))?;
        fill(&volume, &holder)?;
        Ok(volume)
    })
}

/// Makes the store as long as a volume of `size` bytes with so much room takes.
fn make_room(store: &FileStore, size: u64, more: &More) -> Result<(), VolumeError> {
    more.room.map_or(Ok(()), |room| blockcrypt::make_room(store, size, room.bytes(size)))
}

/// Whether an error is one that is found before anything is written.
fn comes_first(error: &ToolError) -> bool {
    let sizes = |e: &VolumeError| {
        matches!(e, VolumeError::TooShort { .. } | VolumeError::Size { .. } | VolumeError::Room { .. })
    };
    matches!(error, ToolError::Volume(_, e) if sizes(e))
}

impl Making<'_> {
    /// Gives what `build` makes its name and its first anchor.
    fn make(
        mut self,
        build: impl FnOnce(FileStore, &VolumeGrant, Arc<FirstAnchor>) -> Result<Volume, ToolError>,
    ) -> Result<VolumeId, ToolError> {
        // Nothing of it is anchored before it is complete, whatever the mode is later.
        self.grant.anchor_mode = AnchorMode::Close;
        let Self { path, place, grant, holder } = self;
        let store = FileStore::exclusive(place.another()?).map_err(|e| ToolError::Volume(path.to_owned(), e))?;
        let first = Arc::new(FirstAnchor { holder: holder.clone(), state: Mutex::new(State::Filling) });
        if grant.anchor.is_some() {
            // Before a device is written to.
            return Err(ToolError::Volume(path.to_owned(), VolumeError::Exists));
        }
        let device = place.is_device();
        place.overwrite();
        let made = || {
            let volume = build(store, &grant, first.clone())?;
            holder.finish()?;
            holder.hush();
            first.complete(place);
            let closed = volume.close();
            let size = volume.size();
            drop(volume);
            first.outcome(path, closed.map(drop))?;
            holder.size(grant.volume, size);
            Ok(())
        };
        match made() {
            Err(error) if device && !comes_first(&error) => {
                Err(ToolError::Overwritten(path.to_owned(), Box::new(error)))
            }
            other => other.map(|()| grant.volume),
        }
    }
}

/// Gives the volume its name when its first anchor comes, for that comes only when all of it is durable; then sends the anchor.
struct FirstAnchor {
    holder: Arc<Holder>,
    state: Mutex<State>,
}

enum State {
    /// It is being written.
    Filling,
    /// All is written: an anchor may come.
    Complete(Place),
    /// It has its name and its anchor.
    Anchored,
    /// It has none, or nobody knows.
    Failed(Failure),
}

enum Failure {
    Place(PlaceError),
    Gone(HolderError),
    Refused(String),
    Unknown(String),
}

impl FirstAnchor {
    fn complete(&self, place: Place) {
        *self.state() = State::Complete(place);
    }

    /// What became of the volume, and of its file.
    fn outcome(&self, path: &Path, closed: Result<(), VolumeError>) -> Result<(), ToolError> {
        let state = std::mem::replace(&mut *self.state(), State::Filling);
        let path = path.to_owned();
        Err(match (state, closed) {
            (State::Anchored, Ok(())) => return Ok(()),
            (State::Anchored, Err(source)) => MakeError::Close { path, source }.into(),
            (State::Failed(Failure::Place(error)), _) => error.into(),
            (State::Failed(Failure::Gone(error)), _) => error.into(),
            (State::Failed(Failure::Refused(why)), _) => MakeError::Anchor(why).into(),
            (State::Failed(Failure::Unknown(why)), _) => MakeError::Unknown { path, why }.into(),
            (State::Filling | State::Complete(_), Err(error)) => ToolError::Volume(path, error),
            (State::Filling | State::Complete(_), Ok(())) => MakeError::NoAnchor(path).into(),
        })
    }

    fn publish(&self, place: Place, anchor: &VolumeAnchor) -> Result<(), Failure> {
        self.holder.still_there().map_err(Failure::Gone)?;
        let published = place.publish().map_err(Failure::Place)?;
        match self.holder.anchor(anchor) {
            Answer::Kept => {
                published.settle();
                Ok(())
            }
            Answer::Refused(why) => {
                published.retract();
                Err(Failure::Refused(why))
            }
            // Perhaps it is kept: then the only copy of what it names must not go.
            Answer::Unknown(why) => {
                published.settle();
                Err(Failure::Unknown(why))
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Anchors for FirstAnchor {
    fn keep(&self, anchor: &VolumeAnchor) -> Result<(), AnchorRefused> {
        let mut state = self.state();
        match std::mem::replace(&mut *state, State::Filling) {
            State::Filling => Err(AnchorRefused::Away("the volume is not complete yet".to_owned())),
            State::Complete(place) => match self.publish(place, anchor) {
                Ok(()) => {
                    *state = State::Anchored;
                    Ok(())
                }
                Err(failure) => {
                    *state = State::Failed(failure);
                    Err(refused())
                }
            },
            State::Anchored => {
                *state = State::Anchored;
                self.holder.keep(anchor)
            }
            State::Failed(failure) => {
                *state = State::Failed(failure);
                Err(refused())
            }
        }
    }
}

/// The engine is told that it is over; why, the state knows.
fn refused() -> AnchorRefused {
    AnchorRefused::Refused("the volume has no first anchor".to_owned())
}
